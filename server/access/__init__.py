"""Who may do what: API keys, their scopes, adapters and limits. No fastapi here."""
