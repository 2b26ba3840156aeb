"""The server's side of the Memory tab: its routes, the state that it shows, the push to open pages."""
