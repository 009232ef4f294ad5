"""Forgot the class."""
