"""The patch set: series and overlay, applied, fitted to other versions, and written anew."""
