"""The contracts, one file each: convert the message, call the engine, convert the answer."""
