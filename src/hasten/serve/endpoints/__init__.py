"""One endpoint a file: from a checked body to an answer."""
