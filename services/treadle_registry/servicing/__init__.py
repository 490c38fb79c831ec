"""The registry's RPCs: convert, call, convert back; a file an area of the contract."""
