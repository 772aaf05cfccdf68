"""Programs that show the library at work; not part of what is installed."""
