def deep():
    raise ValueError("at import")


deep()
