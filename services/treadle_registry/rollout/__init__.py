"""What should be served and what is: deployments, leases, how one follows from the other, who is told."""
