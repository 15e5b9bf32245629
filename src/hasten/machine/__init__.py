"""What this machine is and what it measures: `probe`, `cores`, `memory`, `ceilings`."""
