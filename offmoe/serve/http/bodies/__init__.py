"""What the bodies of requests may hold, one module per API. Parsers check against it, and the document shows it."""
