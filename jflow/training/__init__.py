"""One optimizer step as pure functions: objective, optimizer, state, step."""
