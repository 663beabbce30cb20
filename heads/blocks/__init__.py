"""ROLES: layers that methods are made of."""
