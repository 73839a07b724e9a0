"""Why a value lies as it does, and why a collective is there."""
