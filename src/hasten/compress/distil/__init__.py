"""What was made smaller learns from its source."""
