"""The gateway: the suite's public front door.

It checks every field, has the prompt tokenised, puts the request into its lane and streams the answer back
from the request's log. It holds no model and no state that another gateway could not go on from.
"""
