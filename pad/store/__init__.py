"""Files: whole or absent, recognised, never run as code."""
