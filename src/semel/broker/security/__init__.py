"""Who may connect, who they are, and what they may do: listeners and TLS, SASL logins, credentials, access rules."""
