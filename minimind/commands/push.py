"""`minimind push`."""

from argparse import Namespace

from minimind.common.language import say


def add_parser(commands) -> None:
    parser = commands.add_parser(
        "push",
        help="upload a stage directory or an export to the Hugging Face Hub",
        description=(
            "Only what a reader of the model needs goes up, in one commit, after a search for"
            " secrets; --dry_run lists it. A new repository is private. Log in first with `hf auth"
            " login`, or set HF_TOKEN. See docs/share.md."
        ),
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("directory", help="a stage directory or an export, with its model card")
    add("repository", metavar="OWNER/NAME", help="the repository; it is made if it is not there")
    add("--dry_run", action="store_true", help="list what would go up and what not; no network")
    add("--public", action="store_true", help="of a new repository: everybody may read it")
    add("--revision", metavar="BRANCH", help="the branch, made if it is not there; default: main")
    base = "the repository of an adapter's base; default: what the card says"
    add("--base_model", metavar="OWNER/NAME", help=base)


def run(args: Namespace) -> None:
    """Upload the files, or list them."""
    from minimind.sharing import plan_upload, push

    plan = plan_upload(args.directory, args.repository, args.base_model)
    if not plan.license:
        say(
            "notice: the card states no licence, so that nobody knows what they may do with the"
            f" model. Give one with minimind card {args.directory} --license ID."
        )
    if args.dry_run:
        say(f"{plan.repository} would get {len(plan.files)} files, {plan.size:,} bytes:")
        for file in plan.files:
            say(f"  {file.path.name}: {file.size:,} bytes")
        say("left out:")
        for name, reason in plan.left_out.items():
            say(f"  {name}: {reason}")
        return
    url, private = push(plan, private=not args.public, revision=args.revision)
    visible = "private" if private else "public"
    say(f"pushed {len(plan.files)} files, {plan.size:,} bytes, to {url} ({visible})")
    if args.public and private:
        say(f"notice: the repository was there before, and is private: see {url}/settings")
