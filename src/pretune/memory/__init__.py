"""The memory that training takes, estimated before anything is allocated."""
