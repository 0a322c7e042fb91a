"""The Hub: in folders that the other commands wrote, out repositories, each in one commit; and judges
back from them."""
