"""Every setting's type, rule and meaning. Pydantic only."""
