"""The dual write with Valkey and Redis: fence, effects and the decision in one Lua script."""
