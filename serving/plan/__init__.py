"""What serving a base takes: shapes on the meta device, machines, and the memory of each way to serve it."""
