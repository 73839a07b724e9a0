"""Passes: Program in, Program out. Nothing here touches process groups or devices."""
