"""What a model costs to run, and how fast it should be: `hasten estimate`, and the predictions of others."""
