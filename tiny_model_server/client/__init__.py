"""The inside of ``model_client``: channels, credentials, the local transport."""
