"""How information travels to the last token: representations that become the same, and inputs no longer felt."""
