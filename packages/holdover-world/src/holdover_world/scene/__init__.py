"""What there is to see and to drive: cameras, vehicles, layouts, and recorded clips of them."""
