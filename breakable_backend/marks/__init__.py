"""What users mark, the rules that say what runs eagerly, and what marked functions are."""
