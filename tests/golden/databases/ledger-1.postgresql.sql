CREATE TABLE public.adapter_foundry_ledger (
    number bigint NOT NULL,
    "time" text NOT NULL,
    actor text NOT NULL,
    action text NOT NULL,
    subject text NOT NULL,
    details text NOT NULL,
    previous text NOT NULL,
    digest text NOT NULL
);
INSERT INTO public.adapter_foundry_ledger VALUES (1, '2026-11-22T03:35:21+00:00', 'kim@host', 'init', 'file:///srv/adapters', '{"home":"/srv"}', 'sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855', 'sha256:ada378afff663aa065497c7e3bf3cc1ca0cd40eff4bcc8097596a06893fcd254');
INSERT INTO public.adapter_foundry_ledger VALUES (2, '2026-11-22T03:35:22+00:00', 'kim@host', 'push', 'pixelsmile:1', '{"digest":"sha256:1111111111111111111111111111111111111111111111111111111111111111"}', 'sha256:ada378afff663aa065497c7e3bf3cc1ca0cd40eff4bcc8097596a06893fcd254', 'sha256:db01e2556ca8b8fbc61c5a257353f84d496e3ad16aac44e8dfbae631ba386a13');
INSERT INTO public.adapter_foundry_ledger VALUES (3, '2026-11-22T03:35:22+00:00', 'lee@host', 'promote', 'pixelsmile:1', '{"alias":"pixelsmile@prod","before":null}', 'sha256:db01e2556ca8b8fbc61c5a257353f84d496e3ad16aac44e8dfbae631ba386a13', 'sha256:f609310d4199898b379d69f53cfaaa8ff4b46ce605b96a962d6a58bac865200a');
ALTER TABLE ONLY public.adapter_foundry_ledger
    ADD CONSTRAINT adapter_foundry_ledger_pkey PRIMARY KEY (number);
