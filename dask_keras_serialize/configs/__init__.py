"""Models by their config: what it says, what it would lose, and models cloned from one."""
