"""The engines behind one protocol, each run by its own environment: `python -m engines.NAME_engine`."""
