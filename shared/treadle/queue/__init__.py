"""The queue in Redis: lanes of waiting requests, token streams, heartbeats, control messages.

`keys` names every key. A gateway submits (`submission`), reads logs (`log`), pops its news (`dirty`),
watches and cancels (`control`), and reads who is ready (`workers`). A worker takes from lanes (`lanes`),
takes requests (`epochs`), appends (`log`) and beats (`workers`). `connection` makes the clients.
"""
