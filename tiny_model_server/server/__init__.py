"""The faces: gRPC, HTTP and the local transport."""
