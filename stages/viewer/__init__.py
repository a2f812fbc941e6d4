"""The viewer: a run or a cache as one page, with every figure and rollouts token by token."""
