"""The Valkey sink (and Redis'): fence, effects, parked records and position in one Lua script."""
