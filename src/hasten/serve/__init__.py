"""The server: the OpenAI API over HTTP on the engine for many users. Needs the extra `hasten[serve]`."""
