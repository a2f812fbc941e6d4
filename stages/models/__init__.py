"""The student, the teacher, and the engine that writes rollouts."""
