"""What the rollout engine is made of: slots of K/V, attention over them, the draw, the weights it reads, the step."""
