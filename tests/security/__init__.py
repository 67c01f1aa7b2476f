"""What attackers send, and that it gets them nothing. docs/threat-model.md names the promises; each file here tries one of them."""
