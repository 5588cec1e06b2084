"""What every room stands on: structs, array types, meshes, sharding rules, masks, metrics, budget."""
