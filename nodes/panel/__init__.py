"""The server side of the Memory tab: its routes, the state that it shows, and the push to open pages."""
