"""The queue in Redis: lanes of waiting requests, token streams, heartbeats, control messages."""
