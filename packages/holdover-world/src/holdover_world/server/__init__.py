"""The server: sessions over HTTP and WebSocket, and a page to drive on."""
