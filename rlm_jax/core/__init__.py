"""What every room stands on: structs, array types, mesh, sharding rules, masks, budget."""
