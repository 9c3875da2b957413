"""The programs of a build at work: a prompt, a server, K and V of a text; whether the cache was as asked."""
