"""The phases of a stage: collect rollouts, train the student, refresh the cache, measure."""
