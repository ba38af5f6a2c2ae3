"""What users mark as eager, the rules that say what else runs eagerly, and what marked functions are."""
