"""Speed, measured: our engine and its peers side by side, each in its own process, interleaved."""
