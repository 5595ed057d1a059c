"""Live objects from what arrived: one at a time, values at creation, nothing left behind."""
