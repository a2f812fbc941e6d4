"""What a stage does, phase by phase: collect rollouts, fit the student, refresh the cache, measure."""
