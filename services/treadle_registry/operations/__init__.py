"""Long work (google.longrunning): started once a request_id, run in a process of its own, followed."""
