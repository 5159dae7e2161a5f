"""The teacher's path from context tokens to target tokens: lift, splat, blend, pool. All of it is linear in them."""
